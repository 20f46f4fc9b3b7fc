"""What tests share: tiny models, runs, servers, and how processes are started."""
