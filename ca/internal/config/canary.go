// The settings of canaries: policy candidates that decide on a few nodes.

package config

import (
	"fmt"

	"merlon.dev/ca/internal/rollout"
)

const (
	// DefaultCanaryDeniedPerMille is the default of Config.CanaryDeniedPerMille.
	DefaultCanaryDeniedPerMille = 10
	// DefaultCanaryMinCalls is the default of Config.CanaryMinCalls.
	DefaultCanaryMinCalls = 100
)

func (c *Config) canaryDefaults() {
	if c.CanaryDeniedPerMille == 0 {
		c.CanaryDeniedPerMille = DefaultCanaryDeniedPerMille
	}
	if c.CanaryMinCalls == 0 {
		c.CanaryMinCalls = DefaultCanaryMinCalls
	}
}

func (c Config) checkCanary() error {
	if n := c.CanaryDeniedPerMille; n < 1 || n > 1000 {
		return fmt.Errorf("canary_denied_per_mille: %d is not between 1 and 1000", n)
	}
	if n := c.CanaryMinCalls; n < 1 {
		return fmt.Errorf("canary_min_calls: %d is not at least 1", n)
	}
	return nil
}

// CanaryLimits say when a canary is taken back to shadow.
func (c Config) CanaryLimits() rollout.Limits {
	return rollout.Limits{MaxRise: float64(c.CanaryDeniedPerMille) / 1000, MinCalls: uint64(c.CanaryMinCalls)}
}
