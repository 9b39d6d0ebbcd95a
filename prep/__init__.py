"""What prepare.py is made of: reading rows, what they mean, going on after a stop, writing."""
