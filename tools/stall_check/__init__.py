"""Can one request slow down everybody else? Fires hostile requests at a server and watches what others see."""
