"""What the papers measured, on a user's own model and tasks: one study a file."""
