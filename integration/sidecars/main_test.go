// Package sidecars_test has merlon-sidecar as processes, beside a real CA and a real agent, before
// servers and apps that know nothing of Merlon.
package sidecars_test

import (
	"testing"

	"merlon.dev/integration/stage"
)

func TestMain(m *testing.M) {
	m.Run()
	stage.RemoveBins()
}
