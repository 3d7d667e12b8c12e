"""The replay lab: traces and seeded workloads, driven through the policies that the daemon runs."""
