"""Token side: schedules sequences over a paged KV cache. Free of torch; its door is `interface`."""
