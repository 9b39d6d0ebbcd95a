"""From people's files and hub data sets to the data sets of data.py, for prepare.py."""
