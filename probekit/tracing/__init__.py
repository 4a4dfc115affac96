"""Prompts -> the model's own text -> one teacher-forced pass -> a Trace."""
