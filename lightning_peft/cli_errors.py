"""jsonargparse's messages cut down to what was given, where, and what would work."""


from jsonargparse import import_object  # noqa
