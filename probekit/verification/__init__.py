"""Whether what lies in a folder is what was written there: files, checksums, schema, and the weights behind it."""
