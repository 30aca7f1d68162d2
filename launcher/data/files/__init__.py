"""Files, folders and hub data sets as raw rows."""
