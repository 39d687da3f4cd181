// What the store has of authorities.

package rotation

import (
	"strings"
	"testing"
)

func TestEncodeDecode(t *testing.T) {
	s := begin(t)
	b, err := s.Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := Decode(b)
	if err != nil || !got.Equal(s) {
		t.Errorf("Decode(Encode) = %v, %v", got, err)
	}
	for name, text := range map[string]string{
		"no JSON":          `{`,
		"another version":  `{"v":2}`,
		"twice":            strings.Replace(string(b), `"id":"j"`, `"id":"a"`, 1),
		"two sign":         strings.Replace(strings.Replace(string(b), `"kind":"jwt"`, `"kind":"x509-root"`, 1), `"public_key"`, `"certificate"`, 1),
		"an unknown state": strings.Replace(string(b), `"state":"active"`, `"state":"resting"`, 1),
		"an unknown kind":  strings.Replace(string(b), `"kind":"jwt"`, `"kind":"pgp"`, 1),
		"no public part":   strings.Replace(string(b), `"public_key"`, `"publicKey"`, 1),
	} {
		if _, err := Decode([]byte(text)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func FuzzDecode(f *testing.F) {
	b, err := begin(f).Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := Decode(b)
		if err != nil {
			return
		}
		again, err := s.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Decode(again); err != nil {
			t.Fatalf("what was read is not read again: %v", err)
		}
	})
}
