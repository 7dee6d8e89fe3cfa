"""Texts in and out of files, one kind of file a module; what a module needs beyond Python it imports late."""
