"""What tests share: tiny networks, data, jobs and their fixtures."""
