"""Small tasks on which claims are tested. Each is made from a seed alone, with files that come with Python or scikit-learn."""
