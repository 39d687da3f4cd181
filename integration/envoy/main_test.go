// Package envoy_test has real Envoys that get their secrets from the real agent, and ask it about each
// request.
package envoy_test

import (
	"testing"

	"merlon.dev/integration/stage"
)

func TestMain(m *testing.M) {
	m.Run()
	stage.RemoveBins()
}
