package ca

import (
	"errors"
	"fmt"
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

// Audiences that are of no node any more must not leave the others without a place.
func TestSharesAreKeptUpToABound(t *testing.T) {
	s := &shares{}
	w := s.whole("1")
	for i := range maxShares + 100 {
		of := hashOf([]string{fmt.Sprint(i)})
		if p := w.part(of); w.part(of) != p {
			t.Fatalf("share %d is not kept", i)
		}
	}
	if n := len(w.signed); n != maxShares {
		t.Errorf("%d are kept; want %d", n, maxShares)
	}
}
