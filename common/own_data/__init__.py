"""A folder of images and masks that nobody has described yet: its layout, its classes, and a config that fits it."""
