"""The front end: scripts, the style sheet, and plotly.js with its licence."""
