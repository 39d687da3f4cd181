package badger_test

func runChild() {}
