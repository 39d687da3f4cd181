package policy

import "testing"

// What is taken as a decision ID is written as it was read.
func FuzzParseDecisionID(f *testing.F) {
	for _, s := range []string{NewDecisionID().String(), "000102030405060708090A0B", "00010203040506070809 0b", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		id, err := ParseDecisionID(text)
		if err == nil && id.String() != text || err != nil && !id.IsZero() {
			t.Fatalf("ParseDecisionID(%q) = %s, %v", text, id, err)
		}
	})
}
