"""What is trained: data, losses, evaluation."""
