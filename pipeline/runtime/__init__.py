"""What runs a schedule: workers, the links between them, and the commit of a step."""
