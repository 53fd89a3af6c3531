"""Where models and text come from, and where models go to."""
