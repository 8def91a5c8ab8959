"""What `import unbroken` offers to Python: runs in processes of their own, which end with the interpreter."""
