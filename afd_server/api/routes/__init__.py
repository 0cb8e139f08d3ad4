"""The routes, a file for each kind. A handler is a few lines: admit, run, answer; the room's other files hold how."""
