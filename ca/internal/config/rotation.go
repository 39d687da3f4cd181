// The settings of rotation: how long keys live, and how long one waits before it
// signs.

package config

import (
	"fmt"
	"time"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/rotation"
	"merlon.dev/ca/internal/upstream"
)

// KeepRevoked is how long a revoked authority stays on the list.
const KeepRevoked = 7 * 24 * time.Hour

// maxRefreshHint keeps trust bundles from being so old that nothing helps.
const maxRefreshHint = time.Hour

func (c Config) checkRotation() error {
	for _, ttl := range []struct {
		key   string
		value time.Duration
	}{{"root_ttl", c.RootTTL}, {"intermediate_ttl", c.IntermediateTTL}, {"jwt_key_ttl", c.JWTKeyTTL}} {
		if ttl.value < upstream.MinTTL {
			return fmt.Errorf("%s: %s is less than %s", ttl.key, ttl.value, upstream.MinTTL)
		}
	}
	if c.TrustRefreshHint < time.Second || c.TrustRefreshHint > maxRefreshHint || c.TrustRefreshHint%time.Second != 0 {
		return fmt.Errorf("trust_refresh_hint: %s is not a number of seconds between 1s and %s", c.TrustRefreshHint, maxRefreshHint)
	}
	return c.checkLives()
}

// checkLives refuses keys that end before the next one may sign.
func (c Config) checkLives() error {
	least := c.Rotation().MinLife()
	for _, ttl := range []struct {
		key   string
		value time.Duration
	}{{"root_ttl", c.RootTTL}, {"jwt_key_ttl", c.JWTKeyTTL}} {
		if ttl.value < least {
			return fmt.Errorf("%s: %s is too short for a trust_refresh_hint of %s: the next key is made at half of it, and signs three hints after that at the soonest; make %s at least %s, or trust_refresh_hint at most %s",
				ttl.key, ttl.value, c.TrustRefreshHint, ttl.key, least, (ttl.value / (least / c.TrustRefreshHint)).Truncate(time.Second))
		}
	}
	return nil
}

// Rotation is what the steps of authorities are judged by.
func (c Config) Rotation() rotation.Policy {
	return rotation.Policy{
		RefreshHint: c.TrustRefreshHint, MaxJWTTTL: entry.MaxJWTSVIDTTL, Keep: KeepRevoked,
		LastCall: c.AgentSVIDTTL, // each agent renews once in it
	}
}
