"""What was found, made visible: token text, pictures, tables, the report. Nothing here imports torch."""
