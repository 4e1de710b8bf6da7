"""DARE's models inside the public evaluation harnesses; each module imports its harness, which is an extra."""
