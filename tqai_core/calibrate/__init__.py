"""Offline calibration and tuning: sensitivities, bases, bits, samplers and configurations measured on one model, tied to it by a hash."""
