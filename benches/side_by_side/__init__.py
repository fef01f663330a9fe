"""pgcairn beside pgBackRest and beside native files: one file per topic, one table at the end."""
