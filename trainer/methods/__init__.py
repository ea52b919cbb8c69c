"""What a precision may name beyond a format: code of single methods, one to a file."""
