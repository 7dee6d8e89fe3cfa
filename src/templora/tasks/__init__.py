"""What is done with a text: each task is a generator of events over a session."""
