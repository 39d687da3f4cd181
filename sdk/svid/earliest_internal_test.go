// What time it is at least, whatever becomes of the wall clock.

package svid

import (
	"testing"
	"time"
)

func TestEarliest(t *testing.T) {
	const year = 365 * 24 * time.Hour
	begun := time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)
	for name, tt := range map[string]struct {
		wall, passed, want time.Duration // since begun
	}{
		"nobody set the clock":                  {time.Hour, time.Hour, time.Hour},
		"it jumped ahead":                       {year, time.Minute, time.Minute},
		"it was ahead at the start, and is not": {-year, time.Minute, -year},
		"the machine slept":                     {time.Hour, time.Minute, time.Minute},
	} {
		if got := earliest(begun, begun.Add(tt.wall), tt.passed); !got.Equal(begun.Add(tt.want)) {
			t.Errorf("%s: it is %v at least; want %v", name, got.Sub(begun), tt.want)
		}
	}
	now := time.Now()
	if got := Earliest(now.Add(-time.Hour), now); !got.Equal(now) {
		t.Errorf("Earliest() = %v; want %v", got, now)
	}
}
