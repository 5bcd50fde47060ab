"""What gunicorn reads by itself: app.yaml's command runs in no shell, so nothing would expand a variable there."""

import os

bind = f"0.0.0.0:{os.environ.get('DATABRICKS_APP_PORT', '8000')}"
# One process, so one pool; requests are waiting, not computing.
workers = 1
threads = 8
# Requests that are under way get this long after SIGTERM; Databricks Apps kills after 15 s.
graceful_timeout = 8
