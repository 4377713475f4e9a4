"""Code shared by all papers."""

IGNORE = 255  # label of pixels without a class, everywhere in the project; readers map the value that a dataset stores
