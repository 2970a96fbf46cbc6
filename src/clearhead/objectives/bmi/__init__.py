"""The BMI room: segments, critic, next-segment prediction, weighted likelihood, information; see docs/bmi.md."""
