// What the log commands say without a CA: serial numbers as people have them,
// and mistakes in the command line.

package main

import (
	"bytes"
	"errors"
	"math/big"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestSerialNumbersAreReadAsPeopleHaveThem(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := new(big.Int).SetBytes(rapid.SliceOfN(rapid.Byte(), 1, 20).Draw(t, "number"))
		n.SetBit(n, rapid.IntRange(0, 150).Draw(t, "bit"), 1)
		want := n.Text(16)
		digits := strings.Repeat("0", rapid.IntRange(0, 3).Draw(t, "zeros")) + want
		if rapid.Bool().Draw(t, "upper") {
			digits = strings.ToUpper(digits)
		}
		switch rapid.IntRange(0, 2).Draw(t, "form") {
		case 1:
			digits = "0x" + digits
		case 2:
			if len(digits)%2 > 0 {
				digits = "0" + digits
			}
			var pairs []string
			for i := 0; i < len(digits); i += 2 {
				pairs = append(pairs, digits[i:i+2])
			}
			digits = strings.Join(pairs, ":")
		}
		if got, err := serialNumber(digits, ""); err != nil || got != want {
			t.Fatalf("%q is %q, %v; want %q", digits, got, err, want)
		}
	})
	for _, s := range []string{"", "0", "0x", "00:00", "zzz", "12g", "-1", "+1", "1_0", "0x0x1", "1 2", "0b1z"} {
		if got, err := serialNumber(s, "this way"); got != "" || !isUsage(err) {
			t.Errorf("%q is %q, %v; want a usage error", s, got, err)
		}
	}
}

func isUsage(err error) bool {
	_, ok := errors.AsType[usageError](err)
	return ok
}

// TestMistakesAboutTheLogAreUsageErrors: they never reach a CA, so none is
// taken for an answer of the log.
func TestMistakesAboutTheLogAreUsageErrors(t *testing.T) {
	for want, args := range map[string][]string{
		`"zzz" is no serial number`: {"log", "prove", "zzz"},
		`"zz" is no serial number`:  {"revoke", "--serial", "zz"},
		`"" is no serial number`:    {"revoke", "--serial", ""},
	} {
		var out, stderr bytes.Buffer
		code := run(t.Context(), args, &out, &stderr)
		if code != exitUsage || !strings.Contains(stderr.String(), want) || !strings.Contains(stderr.String(), "hint: ") {
			t.Errorf("%q: exit code %d, %q; want %d, %q and a hint", args, code, stderr.String(), exitUsage, want)
		}
	}
}
