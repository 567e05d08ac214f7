"""What a run takes, before a machine is rented: devices, operations, collectives, memory."""
