"""What no paper owns."""

IGNORE = 255  # of a label, everywhere inside the project; readers map whatever a dataset stores
