"""Write and read run folders: files, redaction, safe loading."""
