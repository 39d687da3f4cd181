// Memory goes back once when a busy time is over, and not in it.

package main

import "testing"

func TestLull(t *testing.T) {
	var l lull
	for i, step := range []struct {
		collected uint64
		want      bool
		why       string
	}{
		{3, false, "it has just started"},
		{9, false, "it is busy"},
		{9, true, "it is quiet"},
		{10, false, "freeing has collected"},
		{10, false, "nothing has come since"},
		{11, false, "Go has collected since two minutes were over"},
		{11, true, "which is quiet again"},
	} {
		if got := l.begins(step.collected); got != step.want {
			t.Errorf("step %d: begins(%d) = %v; want %v: %s", i, step.collected, got, step.want, step.why)
		}
		if step.want {
			l.freed = step.collected + 1
		}
	}
}
