// A CA that is told nothing does not begin.

package ca_test

import (
	"testing"

	"merlon.dev/ca"
)

func TestNewRefusesTheZeroConfig(t *testing.T) {
	if _, err := ca.New(ca.Config{}); err == nil {
		t.Error("New took the zero Config")
	}
}
