"""The page that shows a run: its data, made of records alone, and the front end that draws them, in one file."""
