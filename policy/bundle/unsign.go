package bundle

// This file takes a signature off, so that the same content can be signed
// again.

// Unsign verifies a signed bundle as Verify does and returns it without
// metadata and signature, as Sign takes it.
func Unsign(signed []byte, keys []Key, want Expect) ([]byte, error) {
	if _, err := Verify(signed, keys, want); err != nil {
		return nil, err
	}
	f, err := unpack(signed)
	if err != nil {
		return nil, err
	}
	delete(f, manifestName)
	delete(f, signaturesName)
	return pack(f)
}
