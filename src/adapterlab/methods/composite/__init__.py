"""Several methods attached as one: parts are switched, saved and removed together."""
