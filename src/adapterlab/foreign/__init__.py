"""Meetings with torch and transformers: what differs between their versions and models is asked here, once."""
