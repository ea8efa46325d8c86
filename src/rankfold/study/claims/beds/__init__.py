"""Small tasks on which claims are tested. Each is made from a seed alone and needs no file that does not come with Python or scikit-learn."""
