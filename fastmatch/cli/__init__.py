"""The command line. Only this package parses arguments."""
