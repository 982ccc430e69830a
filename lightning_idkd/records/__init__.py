"""What a run leaves behind: its folder of files, loggers, printed lines and tables, pictures and a report."""
