package ca

import (
	"errors"
	"testing"
)

// A share that could not be made once must not be missing for as long as its
// generation is in force.
func TestWhatCouldNotBeMadeIsTriedAgain(t *testing.T) {
	var m made[int]
	calls := 0
	do := func() (int, error) {
		calls++
		if calls == 1 {
			return 0, errors.New("the device that signs is away")
		}
		return 40 + calls, nil
	}
	if _, err := m.get(do); err == nil {
		t.Fatal("no error")
	}
	for range 2 {
		if got, err := m.get(do); got != 42 || err != nil {
			t.Errorf("%d, %v; want 42, made once", got, err)
		}
	}
	if calls != 2 {
		t.Errorf("made %d times", calls)
	}
}
