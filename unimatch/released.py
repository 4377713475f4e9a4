"""stub"""

RELEASE = None
translate = None
