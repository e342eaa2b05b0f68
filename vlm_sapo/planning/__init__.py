"""What is known before GPU hours are spent."""
